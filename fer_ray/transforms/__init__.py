"""What happens to the pixels: augmentation of grey images, then normalization of batches.

Augmentation takes and gives uint8, so that every normalization sees it the same way. Its
randomness is keyed by (seed, epoch, sample): it depends neither on the number of workers nor
on the order of the images, and a resumed run repeats it exactly.
"""
