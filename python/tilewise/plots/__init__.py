"""Pictures of one room each, in the manner of :mod:`tilewise.plot`: every function draws into axes and returns them."""
