"""Small seeded data sets with known answers: graphs, point sets, chirps in noise, restoration pairs, tokens,
videos.

NumPy on the host; nothing is downloaded.
"""

from . import audio, graphs, pictures, points, restoration, tokens, video

__all__ = ["audio", "graphs", "pictures", "points", "restoration", "tokens", "video"]
