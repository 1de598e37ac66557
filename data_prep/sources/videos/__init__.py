"""Folders of video files."""
