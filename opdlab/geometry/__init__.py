"""The geometry of an update: what changed between two sets of weights, as functions on tensors.

Nothing here knows how the weights were trained. Read in this order, one idea a module:

1. :mod:`~opdlab.geometry.sparsity`: which weights visibly moved.
2. :mod:`~opdlab.geometry.spectrum`: how far, in how many directions, and what became of the singular values.
3. :mod:`~opdlab.geometry.subspaces`: which directions; how far they turned, how early they are settled.
4. :mod:`~opdlab.geometry.masks`: which coordinates, in comparison with the principal and the small weights.
5. :mod:`~opdlab.geometry.nulls` and :mod:`~opdlab.geometry.ruler`: what each of these shows when there is nothing to
   see, and what the size of an update alone makes of them.
6. :mod:`~opdlab.geometry.matrices`, :mod:`~opdlab.geometry.measure`, :mod:`~opdlab.geometry.rows` and
   :mod:`~opdlab.geometry.trajectory`: all of it, in a table, for the matrices of a model.

Conventions: ``w0`` is the origin, ``w1`` the endpoint, ``delta = w1 - w0``. A weight is (m, n) = (outputs, inputs), so
left is the output side and right the input side. Arithmetic is in float64, on the device of the tensor. What is
undefined is NaN, never 0. Entries that are not finite, shapes that differ and numbers out of range raise
:class:`opdlab.errors.OpdlabError`; a function says so only where there is more to it.
"""

from opdlab.geometry.masks import (
    enrichment,
    feasible_range,
    independent_jaccard,
    jaccard,
    largest_entries,
    low_magnitude_mask,
    overlap,
    principal_mask,
    reconstruct,
    smallest_entries,
)
from opdlab.geometry.matrices import Description, describe, weight_matrices
from opdlab.geometry.measure import Resolution, measure_matrix, measure_pair
from opdlab.geometry.nulls import noise_mask, norm_matched, permute, random_walk
from opdlab.geometry.rows import measure_rows
from opdlab.geometry.ruler import change_probability, noise_curve, noise_norm, noise_overlap, noise_sparsity
from opdlab.geometry.sparsity import (
    absolute_sparsity,
    bf16_equal,
    bf16_sparsity,
    density,
    relative_sparsity,
    update_mask,
)
from opdlab.geometry.spectrum import (
    Svd,
    effective_rank,
    frobenius,
    gaussian_stable_rank,
    hill,
    relative_norm,
    singular_values,
    spectral_drift,
    stable_rank,
    svd,
    top_energy,
)
from opdlab.geometry.subspaces import (
    Energy,
    Rotation,
    Similarity,
    cosine,
    principal_angles,
    rotation,
    sim_k,
    similarity_to_end,
    subspace_energy,
    top_left,
    top_right,
)
from opdlab.geometry.trajectory import measure_matrix_trajectory, measure_trajectory
