"""Localization (appendix C): where in an image the object is whose class is known."""
