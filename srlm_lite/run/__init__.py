"""The run directory: the only code that knows a path under it.

Every artefact is either complete or absent as far as a reader can tell: whole files are written
beside their place and renamed into it; journals grow by whole chunks, and a torn tail is cut off.
"""
