from fastbn.reference import *
