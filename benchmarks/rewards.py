"""A reward that a random model earns half of the time: whether its last token's number is even."""


def even(problem: object, text: str) -> float:
    words = text.split()
    return float(bool(words) and int(words[-1][1:]) % 2 == 0)
