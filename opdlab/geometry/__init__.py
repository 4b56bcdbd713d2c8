"""The geometry of an update: what changed between two sets of weights, as functions on tensors.

Nothing here knows how the weights were trained. Read the modules in this order, one idea each: spectrum, subspaces,
masks, nulls; then matrices, measure and trajectory, which measure a weight by all of it.

Conventions: ``w0`` is the origin, ``w1`` the endpoint, ``delta = w1 - w0``. A weight is (m, n) = (outputs, inputs), so
left is the output side and right the input side. Arithmetic is in float64, on the device of the tensor. What is
undefined is NaN, never 0. Entries that are not finite, shapes that differ and numbers out of range raise
:class:`opdlab.errors.OpdlabError`; a function says so only where there is more to it.
"""

from opdlab.geometry.masks import (
    absolute_sparsity,
    bf16_equal,
    bf16_sparsity,
    density,
    enrichment,
    feasible_range,
    independent_jaccard,
    jaccard,
    largest_entries,
    low_magnitude_mask,
    overlap,
    principal_mask,
    reconstruct,
    relative_sparsity,
    smallest_entries,
    update_mask,
)
from opdlab.geometry.matrices import Description, describe, weight_matrices
from opdlab.geometry.measure import Resolution, measure_matrix, measure_rows
from opdlab.geometry.nulls import (
    change_probability,
    noise_curve,
    noise_mask,
    noise_norm,
    noise_overlap,
    noise_sparsity,
    norm_matched,
    permute,
    random_walk,
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
from opdlab.geometry.trajectory import measure_matrix_trajectory
