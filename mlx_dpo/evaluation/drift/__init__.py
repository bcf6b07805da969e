"""The drift report: how far training moved a policy from the model it started from."""
