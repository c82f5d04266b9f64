//! From floating point to the integers that are encrypted and multiplied, and back.
