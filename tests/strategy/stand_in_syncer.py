"""What a supervisor sees of a syncer's process, without a syncer: ``python -m tests.strategy.stand_in_syncer ... RUN_DIR ...``.

The arguments are those of ``lightning-diloco``. It starts in a fraction of a second, says where it serves, gives signs of life, and ends
when it is told to finish.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from lightning_diloco.runtime.life_signs import begin_signs, give_sign

__all__: list[str] = []


def main(arguments: list[str]) -> None:
    """Serve nothing, in a loop."""
    run_dir = Path(arguments[arguments.index("--supervised") - 1])
    hello = json.loads(sys.stdin.readline())
    if "signs_path" in hello:
        begin_signs(Path(hello["signs_path"]))
    temporary = run_dir / "syncer.tmp"
    temporary.write_text(json.dumps({"endpoint": "tcp://127.0.0.1:9", "bulk": "tcp://127.0.0.1:10", "pid": os.getpid()}))
    temporary.replace(run_dir / "syncer.json")
    threading.Thread(target=_obey, daemon=True).start()
    while True:
        give_sign()
        time.sleep(0.02)


def _obey() -> None:
    for line in sys.stdin:
        if json.loads(line)["command"] == "finish":
            os._exit(0)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
