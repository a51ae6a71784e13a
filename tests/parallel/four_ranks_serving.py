"""What four ranks that share a model go through; started by test_serving.py."""

from launching import run_checks
from serving import equal_one_process, evaluated_alike, own_layers_only, ranks_of, spread


def check_layers_and_experts():
    ranks = ranks_of(pipeline=2)
    model = spread(ranks)
    assert model.layers._modules.keys() != {"0", "1", "2", "3"} and ranks.layout.fsdp == 2
    assert equal_one_process(model) and own_layers_only(model, ranks) and evaluated_alike(model)


def check_experts_on_four_ranks():
    model = spread(ranks_of())
    assert equal_one_process(model) and evaluated_alike(model)


def check_one_layer_on_each():
    ranks = ranks_of(pipeline=4)
    model = spread(ranks)
    assert equal_one_process(model) and own_layers_only(model, ranks)


if __name__ == "__main__":
    run_checks(dict(globals()))
