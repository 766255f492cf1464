/** What is wrong in a way that a person can mend, said in one line. */

/** An error whose message is shown as it is; any other is a bug. */
export class PageError extends Error {}
