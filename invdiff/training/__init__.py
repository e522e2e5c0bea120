"""How every shipped prior was trained, runnable again: data, training, export and the model card's measurements."""
