"""The demo model: a real, small Moondream2 that we trained on generated scenes of coloured shapes.

`checkpoint/` holds it in hub layout. It shows the whole product with true answers on any machine, and knows nothing of
the real world.
"""

from pathlib import Path

SAMPLE_VIDEO = Path(__file__).parent / "sample.mp4"
