"""report.html in a real browser, if one is installed."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_qat.report.page import write_report
from lightning_qat.report.sweep_configurations import configurations
from lightning_qat.report.sweep_page import write_sweep_page
from lightning_qat.report.sweep_runs import read_runs
from tests.report.run_folder import make_run
from tests.report.sweep_folder import add_job
from tests.report.test_page import SECTIONS, STAGES, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")


def browse(page: Path, folder: Path) -> tuple[Page, list[str], list[str]]:
    """Return the page as read by the browser, its console output, and its requests."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Page(done.stdout), console, requests(log)


def requests(log: Path) -> list[str]:
    """Return the URLs that pages requested. Requests of the browser itself have no origin."""
    events = [event.get("params") or {} for event in json.loads(log.read_text())["events"]]
    asked = [
        x for x in events if "url" in x and x.get("initiator", "not an origin") != "not an origin"
    ]
    return [x["url"] for x in asked]


@pytest.mark.parametrize("stage", STAGES)
def test_browser_finds_every_section_no_error_and_no_request(stage: str, tmp_path: Path) -> None:
    write_report(*make_run(stage, tmp_path / "run"), tmp_path / "run")
    page, console, asked = browse(tmp_path / "run" / "report.html", tmp_path)
    assert page.ids == SECTIONS
    assert console == []
    assert asked == []


def test_browser_would_tell_of_an_error_and_of_a_request(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://example.invalid/x.png'><script>nothing()</script>")
    _, console, asked = browse(bad, tmp_path)
    assert "nothing is not defined" in "".join(console)
    assert asked == ["http://example.invalid/x.png"]


def test_page_is_no_wider_than_a_phone(tmp_path: Path) -> None:
    names = [f"a class with a rather long name {index}" for index in range(30)]
    write_report(*make_run("qat", tmp_path / "run", names), tmp_path / "run")
    check_width(tmp_path / "run" / "report.html", tmp_path)


def test_page_of_a_sweep_works_in_a_browser_and_on_a_phone(tmp_path: Path) -> None:
    for number in range(3):
        what = f"qconfig=one_with_a_rather_long_name_{number}"
        add_job(tmp_path, what, accuracy__int8=0.9 + number / 100, size_bytes__int8=10**7 + number)
        add_job(tmp_path, f"only=a.layer.with.a.rather.long.name.{number}")
    runs = read_runs(tmp_path)
    write_sweep_page(tmp_path, runs, configurations(runs), "python train.py -m", None)
    page, console, asked = browse(tmp_path / "sweep.html", tmp_path)
    assert {"front", "sensitivity"} < page.ids
    assert console == []
    assert asked == []
    check_width(tmp_path / "sweep.html", tmp_path)


def check_width(page: Path, folder: Path) -> None:
    frame = folder / "frame.html"  # a real window has a minimum width
    frame.write_text(
        f"<iframe src='{page.as_uri()}' style='width:360px;height:800px;border:0'></iframe><script>"
        "onload = () => { const page = frames[0].document.documentElement;"
        "document.title = `${page.clientWidth} ${page.scrollWidth}` }</script>"
    )
    seen, _, _ = browse(frame, folder)
    window, document = map(int, re.findall(r"\d+", seen.words)[:2])
    assert 300 < window <= 360
    assert document == window
