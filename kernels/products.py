"""Products in a loop whose first operand is in registers, as x is that was rounded or computed with: a wait on Hopper.

There a product reads its registers while the program goes on, and Triton (3.6 and 3.7 were looked at) leaves one under
way from a step to the next, which loads the same registers. Mostly it has read them by then; where the tensor cores are
busy with another block it has not, and a tile of the result is wrong.
"""

import triton
import triton.language as tl


@triton.jit
def waited_for(acc, goes_on):
    """acc, where ``goes_on`` is the loop's own condition: true, but known to be so only behind Triton.

    Triton waits within the step for a sum that something else than a product reads there.
    """
    return tl.where(goes_on, acc, 0.0)
