import numpy as np
from numpy.typing import NDArray

def first_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]: ...
