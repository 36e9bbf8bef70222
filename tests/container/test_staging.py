"""Room on the disk, told beforehand."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from uqff.container.staging import check_space


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "out", 1000)
    with pytest.raises(OSError, match=r"1,001 bytes needed, 1,000 free") as caught:
        check_space(tmp_path / "out", 1001)
    assert caught.value.errno == errno.ENOSPC
