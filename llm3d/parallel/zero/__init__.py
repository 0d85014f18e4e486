"""Parameters, gradients and optimizer state without copies: ZeRO. Rajbhandari et al. 2020.

Replicas hold the same parameters; ZeRO lets each keep a shard of what the others would hold too. A *unit* is the
parameters of one module (a transformer layer, the embedding, the final norm, the head) in one flat tensor, which is
cut into equal shards. One mechanism serves all ZeRO stages; they differ in what a rank keeps beside its shards:

    ZeRO stage                       0     1     2     3
    whole parameters at all times    yes   yes   yes   no: gathered a unit ahead of use, freed after
    whole gradients at all times     yes   yes   no: a unit's are summed over the ranks and freed after each microbatch
    optimizer's state                whole shard shard shard
"""
