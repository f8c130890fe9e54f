"""Search for quantization parameters that give a size or a quality, and the prediction of sizes."""
