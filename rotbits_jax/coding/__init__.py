"""Numbers to bits and back, in JAX, knowing neither models nor files.

In the order of reading:

    rans            the coder: a message of many lanes, push and pop
    tables          integer frequency tables
    categorical     many symbols under few tables: the fast path
    floats          a number as a symbol to model and a rest that is noise
    integers        short integers likewise
    scales          classes of scale, and the normal distribution in integers
    contexts        which table each number is coded with
    plans           one array as symbols and raw bytes
    arrays          several arrays as streams that decode on their own

and for bits-back coding:

    codecs          the algebra: pairs (push, pop) and their combinators
    bits_back       a codec from a latent variable model
    haar            rotations under the Haar measure
    symmetric_eig   rotations as eigenvectors of popped numbers, as published
    permutation     the order of rows; `arrays` uses it too
    correction      exact integers from floats that were recovered inexactly
    rotation_codes  haar and symmetric_eig behind one interface
    numbers         arrays of numbers on a message
"""
