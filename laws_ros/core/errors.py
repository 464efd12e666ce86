"""What a user's mistake raises.

Every message is one line that says what is wrong, where (file, field, topic), which value, and what to do.
Commands print it and exit with 2; nodes log it and refuse the transition.
"""


class LawsError(Exception):
    """Base class: the input, not the program, is at fault."""


class ModelError(LawsError):
    """A policy file that is missing, damaged, or has an operator or shape that cannot be used."""


class CardError(LawsError):
    """An observation or action card that is malformed or contradicts its policy or workload."""


class LibraryError(LawsError):
    """A library that is missing, damaged, or made for another policy, card or precision."""


class ConfigError(LawsError):
    """An unknown key, a wrong type or a value out of range in a configuration."""


class ObservationError(LawsError):
    """An observation with a wrong length, a NaN, or a value outside the card's range."""


class FleetError(LawsError):
    """A store, key, signature or update of a fleet that cannot be used."""


class RefusedError(FleetError):
    """An update or upload that was not what the fleet's keys have signed, or is not for this robot."""


class WorkloadError(LawsError):
    """An unknown workload, or one whose observations or actions do not fit the policy."""
