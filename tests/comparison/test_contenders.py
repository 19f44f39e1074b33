"""Who takes part."""

from unlocked.comparison.contenders import all_contenders, choose


def test_contenders_are_chosen_by_the_beginning_of_their_names() -> None:
    specs = all_contenders("cpu", cores=2, processes=2)
    assert len({spec.name for spec in specs}) == len(specs)
    assert [spec.name for spec in choose(specs, ["LLS, 2", "bp, 1 thread"])] == [
        "BP, 1 thread",
        "LLS, 2 threads",
        "LLS, 2 processes",
    ]
