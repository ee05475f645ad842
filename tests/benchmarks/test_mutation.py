from benchmarks.studies.mutation import mutants

SOURCE = '''
@decorator(1)
def f(a: int = 2) -> int:
    """A text."""
    if a < 3 and not a:
        raise ValueError(f"{a + 1}")
    log(a)
    return a * -1.5 if True else a
'''
CHANGES = [
    "def f(a: int=2) -> int: -> def f(a: int=3) -> int:",
    "if a < 3 and (not a): -> if not (a < 3 and (not a)):",
    "if a < 3 and (not a): -> if a < 3 or not a:",
    "if a < 3 and (not a): -> if a <= 3 and (not a):",
    "if a < 3 and (not a): -> if a < 4 and (not a):",
    "if a < 3 and (not a): -> if a < 3 and a:",
    "log(a) -> pass",
    "return a * -1.5 if True else a -> return a * -1.5 if not True else a",
    "return a * -1.5 if True else a -> return a * -1.5 if False else a",
    "return a * -1.5 if True else a -> return a / -1.5 if True else a",
    "return a * -1.5 if True else a -> return a * 1.5 if True else a",
    "return a * -1.5 if True else a -> return a * -2.5 if True else a",
]


def test_each_mutant_has_one_change_and_texts_and_annotations_have_none():
    found = list(mutants(SOURCE))
    assert sorted(mutant.change for mutant in found) == sorted(CHANGES)
    assert len({mutant.source for mutant in found}) == len(CHANGES)
    assert {mutant.line for mutant in found} == {3, 5, 7, 8}
