"""Optimizers and learning-rate schedules, with PyTorch's names, formulas and state dicts."""

from jitgrad.optim import lr_scheduler, swa_utils
from jitgrad.optim.adagrad import Adadelta, Adagrad
from jitgrad.optim.adam import Adam, Adamax, AdamW
from jitgrad.optim.lbfgs import LBFGS
from jitgrad.optim.nadam import NAdam, RAdam
from jitgrad.optim.optimizer import Optimizer
from jitgrad.optim.rmsprop import RMSprop
from jitgrad.optim.rprop import ASGD, Rprop
from jitgrad.optim.sgd import SGD

__all__ = ["ASGD", "LBFGS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "Optimizer", "RAdam",
           "RMSprop", "Rprop", "lr_scheduler", "swa_utils"]
