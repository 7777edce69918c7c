"""Small seeded data sets with known answers: graphs, point sets, chirps in noise, restoration pairs, tokens,
videos.

NumPy on the host; nothing is downloaded.
"""
