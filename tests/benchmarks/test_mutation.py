from benchmarks.studies.mutation import last_runs, mutant, places, reaching_tests, statement_lines, unnoticed

SOURCE = '''
@decorator(1)
def f(a: int = 2) -> int:
    """A text."""
    if a < 3 and not a:
        raise ValueError(f"{a + 1}")
    log(a, strict=True)
    return a * -1.5 if True else a
'''
CHANGES = [
    "def f(a: int=2) -> int: -> def f(a: int=3) -> int:",
    "if a < 3 and (not a): -> if not (a < 3 and (not a)):",
    "if a < 3 and (not a): -> if a < 3 or not a:",
    "if a < 3 and (not a): -> if a <= 3 and (not a):",
    "if a < 3 and (not a): -> if a < 4 and (not a):",
    "if a < 3 and (not a): -> if a < 3 and a:",
    "log(a, strict=True) -> pass",
    "return a * -1.5 if True else a -> return a * -1.5 if not True else a",
    "return a * -1.5 if True else a -> return a * -1.5 if False else a",
    "return a * -1.5 if True else a -> return a / -1.5 if True else a",
    "return a * -1.5 if True else a -> return a * 1.5 if True else a",
    "return a * -1.5 if True else a -> return a * -2.5 if True else a",
]


def test_each_mutant_has_one_change_and_texts_and_annotations_have_none():
    found = [mutant(SOURCE, number) for number in places(SOURCE)]
    assert sorted(each.change for each in found) == sorted(CHANGES)
    assert len({each.source for each in found}) == len(CHANGES)
    assert {each.line for each in found} == {3, 5, 7, 8}


def test_the_tests_that_reach_a_line_run_those_of_the_file_first():
    contexts = {
        1: [""],
        4: ["", "tests.a.test_z.test_one", "tests.b.test_f.test_two"],
        5: ["tests.a.test_z.test_one", "tests.c.test_c.test_three"],
        7: ["tests.c.test_c.test_three"],
    }
    both = ["tests/b/test_f.py::test_two", "tests/a/test_z.py::test_one"]
    assert reaching_tests(contexts, [4], ["tests/a", "tests/b"], "f") == both
    assert reaching_tests(contexts, [5], ["tests/a", "tests/b"], "f") == both[1:]
    assert reaching_tests(contexts, [1], ["tests/a", "tests/b"], "f") == both
    assert reaching_tests(contexts, [7], ["tests/a", "tests/b"], "f") == []
    assert reaching_tests(contexts, [6], ["tests/a", "tests/b"], "f") == []


def test_a_line_belongs_to_its_innermost_statement():
    source = "def f(\n    a,\n):\n    if (a\n        and b):\n        c(\n            d)\n"
    assert [list(statement_lines(source, line)) for line in (2, 5, 7)] == [[1, 2], [4, 5], [6, 7]]


def test_the_last_run_of_a_change_counts():
    change = {"file": "a.py", "line": 3, "column": 1, "change": "a -> b"}
    runs = [
        {**change, "outcome": "survived"},
        {**change, "outcome": "survived", "column": 2},
        {**change, "outcome": "timeout", "column": 3},
        {**change, "outcome": "killed", "line": 5},
    ]
    assert [run["outcome"] for run in last_runs(runs).values()] == ["killed", "survived", "timeout"]
    assert list(unnoticed(runs).values()) == runs[1:3]
    assert list(unnoticed([*runs, {**runs[1], "reason": "speed"}]).values()) == runs[2:3]
