"""How the picturebook pack is made. Not part of the wheel."""
