"""Progress is a bar on a terminal, and a line now and then in a log."""

import os
import pty
import re
import termios

from minclip.corpus import progress
from tests.support.corpora import encode_file, start, stop_after


def test_a_log_gets_a_line_now_and_then(params, captions, output, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    stop_after(params, captions, output, 3)
    encode_file(params, captions, output, progress=True)
    lines = capsys.readouterr().err.splitlines()
    said = [re.fullmatch(r"(\d+) of 50 texts, [\d,]+ texts/s, 00:\d\d left", line) for line in lines]
    assert [int(line.group(1)) for line in said if line] == [32, 40, 48, 50]


def test_a_terminal_gets_a_bar_with_rate_and_time_left(model, captions, output):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = start("--file", captions, "-o", output, "--model", model, stderr=theirs)
    process.communicate(timeout=100)
    os.close(theirs)
    shown = os.read(ours, 2**16).decode()
    os.close(ours)
    assert process.returncode == 0
    assert re.search(r"100%.*50.*/50.* \[\d\d:\d\d<\d\d:\d\d, .*texts/s\]", shown)
