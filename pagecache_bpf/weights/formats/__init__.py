# SPDX-License-Identifier: Apache-2.0
"""One module for each format of weight files; they are found, so none is listed anywhere.

A module has FORMATS, a tuple of weight_format.WeightFormat: what such files are called, how one is
told from others, and what reads its header.  It is imported wherever files are looked for, so what
takes long to import (numpy, zipfile) is imported by the function that needs it.
"""
