"""Run a .tflite network, under the Python that has TensorFlow: tflite_run.py MODEL.tflite INPUT.npy OUTPUTS.npz.

A script of its own, without imports from this package, because that Python has nothing else of ours.
"""
import sys
from typing import Any

import numpy as np
import tensorflow as tf


def run(model: str, array: np.ndarray) -> dict[str, Any]:
    """Outputs by the network's own names."""
    interpreter = tf.lite.Interpreter(model_path=model)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], array)
    interpreter.invoke()
    return {output["name"]: interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()}


if __name__ == "__main__":
    np.savez(sys.argv[3], **run(sys.argv[1], np.load(sys.argv[2])))
