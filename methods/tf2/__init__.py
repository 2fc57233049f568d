"""TF2: ReferFormer with a second image stream, the tracked object alone."""
