"From a trained student to files that run on a device."
