"""What talks to Ray and to the machine."""
