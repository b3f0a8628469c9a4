"""Half a minute of the soak on each database; the ten minutes are run by hand."""

from __future__ import annotations

import pytest

from tests.soak.mixed_load import main


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_nothing_is_wrong_lost_or_hung_under_mixed_load(database: str, capsys: pytest.CaptureFixture[str]):
    code = main(["--seconds", "30", "--pictures", "1", "--database", database])
    printed = capsys.readouterr().out
    with capsys.disabled():
        print("\n" + printed)
    assert code == 0, printed
