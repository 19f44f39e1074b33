"""The network that a recipe names, ready to be cut, for whatever its data is: images with classes, or text."""

from unlocked.data import ImageDataset
from unlocked.runtime.input import beside_of, probe_sample
from unlocked.runtime.learned import learned_from
from unlocked.runtime.network import Network, build_network
from unlocked.runtime.recipe import Recipe, make_model

__all__ = ["network_of"]


def network_of(recipe: Recipe, train: ImageDataset) -> Network:
    """As `Trainer.fit` builds it. Raises: ValueError: network and data don't fit."""
    return build_network(
        make_model(recipe, train),
        input_shape=train.image_shape,
        num_classes=train.num_classes,
        seed=recipe.seed,
        sample=probe_sample(train),
        learned=learned_from(train, None),
        beside=beside_of(train),
    )
