"""What a user can mend: the file, a flag or the folder is named, with what is allowed."""


class ConversionError(ValueError):
    """A file, folder or flag with which no model can be converted, exported or inspected."""
