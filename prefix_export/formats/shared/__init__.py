"""What readers share: files from outside, what was trained, and how it was parametrised."""
