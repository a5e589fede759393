"""A team of threads that compute one thing together and exchange arrays on the way."""

from queue import SimpleQueue


class Team:
    """`size` threads, numbered from 0. They exist while `run` does; number 0 is the calling thread."""

    def __init__(self, size):
        self.size = size
        self.boxes = [[SimpleQueue() for _ in range(size)] for _ in range(size)]  # boxes[to][from]

    def run(self, function):
        """Return function(0), while the other threads run function(1), function(2), ...

        Raises the error of any of them.
        """
        if self.size == 1:
            return function(0)
        from concurrent.futures import ThreadPoolExecutor  # here, because it takes time to import

        with ThreadPoolExecutor(self.size - 1) as pool:
            others = [pool.submit(self.member, function, number) for number in range(1, self.size)]
            try:
                return self.member(function, 0)
            finally:
                for other in others:
                    other.result()

    def member(self, function, number):
        """Return function(number). If it raises, free the threads that wait for this one."""
        try:
            return function(number)
        except BaseException as error:
            for box in self.boxes:
                box[number].put(error)
            raise

    def exchange(self, number, array):
        """Give an array of thread `number` to all threads, and return the arrays of all, in order.

        The caller must not change its array before the exchange after next: others may still read it.
        """
        if self.size == 1:
            return [array]
        for box in self.boxes:
            box[number].put(array)
        arrays = [box.get() for box in self.boxes[number]]
        for error in arrays:
            if isinstance(error, BaseException):
                raise error
        return arrays
