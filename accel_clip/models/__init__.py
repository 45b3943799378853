"""Models from open_clip, built, frozen and taken apart."""
