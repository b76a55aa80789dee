"""Arrays relative to those of a base: another model, which the receiver of a file has.

They are stored as `structured.difference`: a known array plus differences.

    entries          entries of the manifest: which array of the base a leaf needs
    base             finds the arrays of a base, and stores the differences
    measure          chooses how differences are stored
    factors          a product of two matrices that predicts differences
    products         tensors of a sliced model as products with its dense base
    recipe           the sliced model as a source of encoding
    rounding_errors  tells rounding errors from changes that are as small
"""
