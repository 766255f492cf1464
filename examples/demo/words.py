"""The words that the demo's lighthouses are made of."""

from __future__ import annotations

from collections.abc import Mapping


def _words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NAME_STARTS = _words(
    """
    Amber Anchor Auk Barnacle Beacon Bell Brume Cormorant Coral Curlew Dulse Dunlin Eider Éloi
    Ember Fathom Fulmar Gannet Garnet Gråben Grebe Gull Halyard Heron Juniper Kelp Kittiwake
    Lantern Limpet Lugger Mackerel Marram Måsen Mussel Nørre Océane Osprey Otter Petrel Pilchard
    Plover Puffin Raven Razor Sable Samphire Scoter Sørla Sprat Tern Thistle Tide Tinder Urchin
    Véronne Whimbrel Whelk Widgeon Winch Wrack
    """
)
NAME_ENDS = _words(
    """
    Point Ness Skerry Head Rock Holm Reef Stack Spit Bank Horn Cape Ledge Sound Mouth Bar Steps
    Teeth Bluff Finger Elbow Gate Table Wall
    """
)
ISLE_STARTS = _words(
    """
    Brønd Skar Hval Måke Lyng Tern Sel Örn Vær Æbel Fisk Kråk Strand Vind Torsk Bølge Rav Mid
    Øster Vester Got Kol Hav Lom Sild Tang Ulv Perl Grå Blå
    """
)
ISLE_ENDS = _words("sø holm øya vik ness ø by sund havn fjord skär mark")
KEEPER_FIRST = _words(
    """
    Maëlle Anton Birgit Céleste Dagny Edvard Fátima Goran Hélène Iñaki Jörg Kirsten Ludvík
    Małgorzata Noé Oda Pål Queenie Rosa Søren Tove Ulrike Viggo Wilma Ximena Yann Zoë Agnès Bjørn
    Chloé Duarte Eskil Frøya Gustav Håkon Inês Jonas Klára Léonie Mads Nanna Olaf
    """
)
KEEPER_LAST = _words(
    """
    Abel Bakke Corbin Dahl Eriksen Falk Grønn Hauge Ibarra Jansen Kvist Lagerlöf Moreau Nygård
    Olsen Pereira Quist Ruiz Sand Thorne Uhl Vance Wessel Yates Zander Åkesson Berg Crane Dupré
    Engel Ferrão Göransson Holt Isaksen Juhl Krüger Lund Muñoz Nilsen Ødegård Pryce Rask
    """
)
TOWERS = _words("red white black grey blue green yellow ochre orange striped")
TEMPERS = _words("deaf old idle shy proud one-eyed elderly noisy tame wary")
ANIMALS: Mapping[str, str] = {
    "cat": "🐈",
    "dog": "🐕",
    "goat": "🐐",
    "sheep": "🐑",
    "rooster": "🐓",
    "turtle": "🐢",
    "rabbit": "🐇",
    "pig": "🐖",
    "duck": "🦆",
    "owl": "🦉",
    "otter": "🦦",
    "parrot": "🦜",
}
COLOURS: Mapping[str, str] = {"W": "white", "R": "red", "G": "green"}
COUNTS: Mapping[int, str] = {1: "one", 2: "two", 3: "three", 4: "four"}
MONTHS_OPENING = _words("March April May June")
MONTHS_CLOSING = _words("August September October November")
