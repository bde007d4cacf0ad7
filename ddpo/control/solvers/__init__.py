"""Methods that must find the answers: policy iteration, Q-learning, generators, adjoint matching, deep BSDE."""
