"""Write a decoder as optimum-intel does: attention in one operation, the cache in states that are appended to in place.

Run in an environment of optimum-intel's own, whose transformers is older than ours: python with_optimum.py FOLDER
"""

import sys
from pathlib import Path

import openvino
from optimum.intel.openvino import OVModelForCausalLM, OVModelForFeatureExtraction
from transformers import AutoModelForCausalLM


def write(folder: Path, decode: bool) -> None:
    """Read the float model in `folder`/float; write the int8 graph, whose first output is the last hidden state."""
    source = folder / "float"
    kind = OVModelForFeatureExtraction
    if decode:
        # the class that optimum-intel gives a cache; its head is cut off again
        kind = OVModelForCausalLM
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(source.with_name("headed"))
        source = source.with_name("headed")
    graph = kind.from_pretrained(source, export=True, compile=False, load_in_8bit=True).model
    if decode:
        _cut_head(graph)
    openvino.save_model(graph, folder / "int8.xml", compress_to_fp16=False)


def _cut_head(graph: openvino.Model) -> None:
    logits = graph.output("logits").node
    node = logits.input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    graph.add_results([openvino.opset13.result(node.input_value(0))])
    graph.remove_result(logits)
    graph.validate_nodes_and_infer_types()


if __name__ == "__main__":
    write(Path(sys.argv[1]), decode=sys.argv[2] == "decode")
