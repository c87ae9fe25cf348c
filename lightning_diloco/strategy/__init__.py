"""The Lightning side: strategy, callback, launcher and the processes that it starts.

Importing this package imports nothing else: a learner process has to settle its rank before Lightning is imported, and
`lightning_diloco` itself has to stay light for the syncer process. Import the modules.
"""

from __future__ import annotations

__all__: list[str] = []
