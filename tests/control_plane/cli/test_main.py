from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.version import penstock_version


def test_the_version_is_shown_without_a_command() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"penstock {penstock_version()}\n")
