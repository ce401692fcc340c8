"""The errors that `python -m tests.mutants` asks the tests to catch."""

import ast

from . import mutations


def test_every_function_has_one_and_it_is_another_program() -> None:
    chosen = mutations.chosen()
    assert len(chosen) >= 60
    for mutant in chosen:
        assert mutant.place(mutations.ROOT)[0] == f"fastbn/{mutant.file}"
        assert ast.dump(ast.parse(mutant.new)) != ast.dump(ast.parse(mutant.old)), mutant
    every = [function for file in mutations.SCOPE for function in mutations.functions(file)]
    assert {(function.file, function.name) for function in every} - {mutant[:2] for mutant in chosen} == {
        ("cpu/passes.py", "warmup")
    }
    assert mutations.chosen() == chosen
