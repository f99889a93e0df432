"""What a trained run can do: vqa, caption and retrieval score it, run.py is the door that `flm eval` enters by, show.py and samples.py make
it visible. May import engine, observe, parallel, model, objectives, data, checkpoint.weights and below; nothing in training imports this.
"""
