"""How a model is spread over ranks: mesh, boxes, tensor-parallel layers, schedules, the pipeline executor."""
