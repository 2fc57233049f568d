"""Who answers: the method interface, the controls and the ported methods."""
