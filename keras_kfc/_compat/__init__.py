"""Private names of Keras and TensorFlow that the package cannot do without, one function each."""
