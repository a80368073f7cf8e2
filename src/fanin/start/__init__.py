"""The head's start from data: a ridge classifier's rows in the form that the head has, and each label's words (`build`)."""
