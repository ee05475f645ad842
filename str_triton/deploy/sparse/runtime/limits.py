"""The limit of the memory for a network: the sizes in a file may be any, and so may those that follow from them."""

# The largest size of one value, and of all padded images: a constant, plus a multiple of what is given.
FREE_NBYTES, NBYTES_PER_BYTE = 2**30, 64


class TooLarge(ValueError):
    """The error for an image whose offsets do not fit into 32 bits, or for memory beyond reason."""


def check_memory(what: str, nbytes: int, given: int) -> None:
    """Raise TooLarge where `what` takes too much memory for so many bytes of weights and arguments, or of values."""
    if nbytes > FREE_NBYTES + NBYTES_PER_BYTE * given:
        raise TooLarge(f"{what} would take {nbytes:,} bytes, too many for the {given:,} bytes that it is made from")
